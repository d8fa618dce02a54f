//! The part of flexq.h that this example uses, by hand. Structs are as in C, `repr(C)`, and begin with their size.

use std::ffi::{c_char, c_void, CStr};

pub const F32: i32 = 0;
const OK: i32 = 0;
pub const ALIGNMENT: usize = 64;

#[repr(C)]
pub struct WeightDesc {
    struct_size: usize,
    pub n: i64,
    pub k: i64,
    pub weight_bits: i32,
    pub scheme: i32,   // 0: a scale per row and 128 inputs, 1: one per row
    pub rotation: i32, // 0: none, 1: hadamard128
    reserved: i32,
}

impl WeightDesc {
    /// As FLEXQ_WEIGHT_DESC_INIT: 6 bits, scheme group, rotated.
    pub fn new(n: i64, k: i64) -> Self {
        let struct_size = std::mem::size_of::<Self>();
        Self { struct_size, n, k, weight_bits: 6, scheme: 0, rotation: 1, reserved: 0 }
    }
}

#[repr(C)]
pub struct Stream {
    struct_size: usize,
    device: i32, // 0: CPU
    device_index: i32,
    handle: *mut c_void,
    executor: *const c_void, // null: the calling thread
    kernel: *const c_char,
}

impl Stream {
    /// As FLEXQ_STREAM_INIT, with the threads of a pool.
    pub fn cpu(pool: &ThreadPool) -> Self {
        Self {
            struct_size: std::mem::size_of::<Self>(),
            device: 0,
            device_index: 0,
            handle: std::ptr::null_mut(),
            executor: unsafe { flexq_thread_pool_executor(pool.0) },
            kernel: std::ptr::null(),
        }
    }
}

#[rustfmt::skip]
extern "C" {
    fn flexq_last_error() -> *const c_char;
    fn flexq_thread_pool_create(threads: i32, pool: *mut *mut c_void) -> i32;
    fn flexq_thread_pool_destroy(pool: *mut c_void);
    fn flexq_thread_pool_executor(pool: *const c_void) -> *const c_void;
    pub fn flexq_weight_size(desc: *const WeightDesc, planes: *mut usize, scales: *mut usize) -> i32;
    pub fn flexq_quantize_weight(
        stream: *const Stream, desc: *const WeightDesc, w: *const c_void, dtype: i32, ldw: i64,
        planes: *mut u8, scales: *mut u16, vanished: *mut i64) -> i32;
    pub fn flexq_prepack_size(stream: *const Stream, desc: *const WeightDesc, bytes: *mut usize) -> i32;
    pub fn flexq_prepack(
        stream: *const Stream, desc: *const WeightDesc, planes: *const u8, scales: *const u16,
        prepacked: *mut c_void, bytes: usize) -> i32;
    pub fn flexq_linear_workspace_size(
        stream: *const Stream, desc: *const WeightDesc, act_bits: i32, m: i64, bytes: *mut usize) -> i32;
    pub fn flexq_linear(
        stream: *const Stream, desc: *const WeightDesc, prepacked: *const c_void, prepacked_bytes: usize,
        act_bits: i32, m: i64, x: *const c_void, x_dtype: i32, ldx: i64, bias: *const c_void, bias_dtype: i32,
        y: *mut c_void, y_dtype: i32, ldy: i64, workspace: *mut c_void, workspace_bytes: usize) -> i32;
}

/// A failed call as an error with the library's message.
pub fn check(status: i32) -> Result<(), String> {
    if status == OK {
        return Ok(());
    }
    Err(unsafe { CStr::from_ptr(flexq_last_error()) }.to_string_lossy().into_owned())
}

pub struct ThreadPool(*mut c_void);

impl ThreadPool {
    pub fn new(threads: i32) -> Result<Self, String> {
        let mut pool = std::ptr::null_mut();
        check(unsafe { flexq_thread_pool_create(threads, &mut pool) })?;
        Ok(Self(pool))
    }
}

impl Drop for ThreadPool {
    fn drop(&mut self) {
        unsafe { flexq_thread_pool_destroy(self.0) }
    }
}

/// Memory aligned as prepacked weights and workspaces must be.
pub struct Buffer(Vec<Line>, usize);

#[repr(C, align(64))]
#[derive(Clone, Copy)]
struct Line([u8; ALIGNMENT]);

impl Buffer {
    pub fn new(bytes: usize) -> Self {
        Self(vec![Line([0; ALIGNMENT]); bytes.div_ceil(ALIGNMENT).max(1)], bytes)
    }
    pub fn as_mut_ptr(&mut self) -> *mut c_void {
        self.0.as_mut_ptr().cast()
    }
    pub fn as_ptr(&self) -> *const c_void {
        self.0.as_ptr().cast()
    }
    pub fn len(&self) -> usize {
        self.1
    }
}
