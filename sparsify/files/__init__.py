"""Files that people and programs read: written whole or not at all, and read within bounds. Knows of no models or images.

destinations             what a write to a path reaches, and whether it can be written
locks                    outputs that are held while long work makes them, folders for what is being written
outputs                  files written whole or not at all
plain_json, plain_yaml   reports and recipes
tensors, tensor_rows     safetensors files, read; and written row by row
"""
