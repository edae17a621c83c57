"""Student checkpoint -> artefact: ONNX, GGUF and TensorRT files with measured parity. Run `python -m export --help`."""
