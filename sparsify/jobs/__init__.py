"""One module for each job that ends in a file or a repository. May import everything but cli and api.

convert, tune    a name to a calibrated, maybe fine-tuned file; its training half
sweep            one model at several keeps and targets
dense            the way to a dense model and its calibration, for convert and sweep
save, push       a model trained further back into a file; a file into a repository of the hub
show, report     what a model does with images; a page about a file
against          a model and its dense original timed in several runtimes
runtimes         what runs a model: eager, torch.compile, programs
export, judge    a file as an ONNX, OpenVINO or PyTorch program; such a program on images
predict          images to classes with names, or to features
"""
