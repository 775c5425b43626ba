"""A sparse model as a program of another runtime."""
