"""Training with PyTorch (optional extra ``distill``): an executor of ONNX graphs, distillation and trained DQC."""
