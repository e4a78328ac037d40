"""`polyhead compare`: a league with progress bars, and the folder that shows how it stands."""
