"""Train a behaviour into a model, frozen context and all, and keep what was learned as checkpoints and task vectors."""
