"""A sparse model as a program of another runtime.

program                 the job: trace, describe, write, compare with the model
onnx_file, pt2_file     the formats
"""
