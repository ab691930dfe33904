"""The one error a user's mistake raises."""


class UserError(Exception):
  """A mistake of the user's: what was wrong, where, and what to do, in a line.

  The command line prints it without a stack trace and exits with 2; library
  callers may catch it as any exception.
  """
