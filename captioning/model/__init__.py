"""What models.py and train.py call: encoders, beams, losses, schedules, checkpoints."""
