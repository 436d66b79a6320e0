"""The sources of plans: files, the rule and the tuner."""
