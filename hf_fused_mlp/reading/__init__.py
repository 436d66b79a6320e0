"""What does a module compute? Answered by reading the forward of its class."""
