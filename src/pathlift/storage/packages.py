"""Packages that come with an extra of pathlift, and the error that says which extra when one is missing."""

from pathlift.failures import MissingPackageError as MissingPackageError
from pathlift.failures import package as package
