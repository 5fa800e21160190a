"""Validation data in folds, and calibration inputs from the training data."""
