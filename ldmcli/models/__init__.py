"""The networks as plain nn.Modules: no files, no command line, no globals."""
