"""One module for each job that ends in a file or a repository."""
