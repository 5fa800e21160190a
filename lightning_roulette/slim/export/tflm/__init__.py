"""Files for TensorFlow Lite Micro in which pruned weights take one bit, and its runtime."""
