"""Runs as their logs tell of them: arms, gaps and verdicts, the frontier of loss against time, figures."""
