"""One module for each command: parse, call one job, render. torch and timm are imported inside the functions only."""
