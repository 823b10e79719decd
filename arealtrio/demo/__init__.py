"""A whole asynchronous RL run on one machine: servers, rollouts, a trainer, and a task to learn."""
