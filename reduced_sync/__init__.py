"""What the commands share: modules that serve them all, and subpackages named after what they are for."""
