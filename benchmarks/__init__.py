"""Figures, measured: `make bench`. None of it is part of the product; no test times anything."""
