"""Callbacks that measure the steps of other libraries' trainers. Each module imports the library that it is named after."""
