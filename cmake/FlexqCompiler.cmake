# How every target of the project is compiled: flexq_compile(target).
find_package(Threads REQUIRED)

function(flexq_compile target)
  target_compile_features(${target} PUBLIC c_std_99 PRIVATE cxx_std_20)
  set_target_properties(${target} PROPERTIES
    CXX_EXTENSIONS OFF CXX_VISIBILITY_PRESET hidden VISIBILITY_INLINES_HIDDEN ON POSITION_INDEPENDENT_CODE ON)
  # No contraction: rotation and quantization must round alike on every backend.
  target_compile_options(${target} PRIVATE
    $<$<COMPILE_LANGUAGE:C,CXX>:-Wall -Wextra -Wconversion -Wshadow -ffp-contract=off>
    # Symbols that are unique in a process keep a shared library from being unloaded.
    $<$<COMPILE_LANG_AND_ID:CXX,GNU>:-fno-gnu-unique>)
  if(FLEXQ_SANITIZE)
    target_compile_options(${target} PRIVATE
      $<$<COMPILE_LANGUAGE:C,CXX>:-fsanitize=${FLEXQ_SANITIZE} -fno-sanitize-recover=all -fno-omit-frame-pointer -g>)
    target_link_options(${target} PUBLIC -fsanitize=${FLEXQ_SANITIZE})
  endif()
endfunction()
