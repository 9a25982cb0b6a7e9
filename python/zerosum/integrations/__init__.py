"""Provides callbacks that measure the steps of other libraries' trainers. Each module imports the library it is named after."""
