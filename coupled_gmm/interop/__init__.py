"""Mixtures of other libraries: scikit-learn's, OTT's, POT's (`convert`)."""
