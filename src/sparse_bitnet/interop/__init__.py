"""Other people's file formats and libraries."""
