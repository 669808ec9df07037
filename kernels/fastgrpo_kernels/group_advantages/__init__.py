"""Rewards to advantages, group by group."""
