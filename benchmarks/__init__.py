"""What the trainer and the ops cost, in time and memory, against what one would write without them. See README.md."""
