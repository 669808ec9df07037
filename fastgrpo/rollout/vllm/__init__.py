"""vLLM as a rollout engine: beside the policy in this process, or as servers."""
