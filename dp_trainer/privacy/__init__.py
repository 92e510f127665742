"""Numbers and randomness: what may leave the run, and how it is counted.

Imports no model code. Nothing is loaded here, so that the number side
(``accounting``) starts without torch; import from the modules themselves.
"""
