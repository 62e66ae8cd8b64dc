"""What the commands share. What stands here serves them all; the rooms are named after what they are for."""
