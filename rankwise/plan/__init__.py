"""What a training run will take, before it is launched; the command is `python -m rankwise.plan`."""
