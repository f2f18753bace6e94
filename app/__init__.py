"""The command line, the studio and the server: thin layers over `compose`."""
