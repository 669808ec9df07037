"""What only a GPU can show, stage by stage; `python -m benchmarks.gpu_suite` runs them. Small forms run on a CPU."""
