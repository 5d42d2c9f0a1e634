"""What a policy is worth: held-out metrics, rewards of its own samples, and what they cost in KL."""
