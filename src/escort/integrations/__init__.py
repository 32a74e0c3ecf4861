"""Where users already are: other libraries' ways in and out, each imported only when it is used."""
