"""What a file holds of a program: its JSON, the closed lists, the limits, and the rehearsal before anything runs."""
