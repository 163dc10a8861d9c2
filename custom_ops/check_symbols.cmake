# Fails unless the one symbol that OBJECT shows the linker is the table ALLOWED (a part of its mangled name).
# Anything else could be merged with the same inline function of another file, and run on a processor that lacks it.
execute_process(
  COMMAND ${NM} -g --defined-only ${OBJECT}
  OUTPUT_VARIABLE listing
  RESULT_VARIABLE failed)
if(failed)
  message(FATAL_ERROR "${NM} cannot read ${OBJECT}")
endif()
string(STRIP "${listing}" listing)
string(REPLACE "\n" ";" lines "${listing}")
list(LENGTH lines count)
if(NOT count EQUAL 1 OR NOT listing MATCHES "${ALLOWED}")
  message(FATAL_ERROR "${OBJECT} must show only ${ALLOWED}, but shows:\n${listing}")
endif()
