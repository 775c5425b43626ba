"""What several test modules and benchmarks share; test modules never import each other."""
