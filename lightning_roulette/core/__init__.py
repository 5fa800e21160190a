"""The method itself, on torch alone: importance, wheel, masks, selection, search and its report."""
