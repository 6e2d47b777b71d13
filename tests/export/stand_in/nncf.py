"""Stand-in for a package that the environment must have."""
