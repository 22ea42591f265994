"""Networks as ONNX, in the folder layout Optimum reads, and the proof that they draw the same."""
