"""One module for each command of the command line. torch and timm are imported inside the functions only."""
