"""The Frechet distance: statistics, engines, estimators and the Gaussian map."""
