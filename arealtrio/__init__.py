"""arealtrio: the rollout half of asynchronous RL for language models."""
