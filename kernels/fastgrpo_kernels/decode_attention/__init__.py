"""One new token per sequence against keys and values that are kept."""
