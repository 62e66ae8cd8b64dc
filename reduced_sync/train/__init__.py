"""The keys of an experiment, and what a run leaves to be read: the recorder and the log."""
