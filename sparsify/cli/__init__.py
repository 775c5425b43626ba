"""What a person types and sees. Only roots are imported before a command runs."""
