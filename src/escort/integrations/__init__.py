"""Other libraries' files and ways of asking, each in a room of its own that imports its library only when it is used."""
