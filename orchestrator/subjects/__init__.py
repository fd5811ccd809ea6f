"""Datasets, architectures, splits, original models; ONNX in and out."""
