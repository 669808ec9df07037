"""The gated activation of an MLP."""
