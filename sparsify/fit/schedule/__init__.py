"""The search for keep and token rates of every block for a target."""
