"""Before anything starts: the configuration in force, what can be checked, how much memory it takes."""
