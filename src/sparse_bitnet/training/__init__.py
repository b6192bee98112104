"""Training with the Hugging Face Trainer: schedules, monitors, the callback, checkpoints that survive anything."""
